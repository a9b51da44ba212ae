"""Values of the field: address, envelope, status, header fields, DSN. No I/O, no clock."""
