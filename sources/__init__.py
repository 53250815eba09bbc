"""What comes in: everything foreign becomes ours here, checked once, with one clear sentence where it cannot."""
