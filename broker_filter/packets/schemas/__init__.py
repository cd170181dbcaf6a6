"""Writer's schemas: parsing, lookup by id in registries, registration, and their default values."""
