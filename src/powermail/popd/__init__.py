"""Front door for reading by POP3 (110, 995)."""
