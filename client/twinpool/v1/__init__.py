"""Generated wire types. Do not edit: run `make proto`."""
