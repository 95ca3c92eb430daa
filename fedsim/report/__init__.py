"""One page that says what a run or a study was, what came out, and how to get it again."""
