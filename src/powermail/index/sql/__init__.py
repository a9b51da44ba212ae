"""Owns the index as SQL: one text for every engine. `index.sqlite` and `index.postgres` run it, and add what must differ.

Bodies of transactions are coroutines over `sql.engine.Transaction`; the engine decides what a wait is. Where others write
too, what a body decides by is locked first (laws 6-9; the order stands in `sql.engine`).
"""
