"""What the tests of several packages share: tiny models, the table of adapter methods, and the laws as functions."""
