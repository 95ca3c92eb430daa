"""Models of `kind: module`, by name; sizes follow from the data."""
