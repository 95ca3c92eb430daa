"""Tables of records: where they come from, how they are cleaned, and what a problem sees of them."""
