"""The six stages. Each reads files, writes files, and can be run on its own."""
