"""Owns the tables on PostgreSQL: made and brought on by alembic, as a command of the operator only, never at a start."""
