"""Front doors that take mail: SMTP (25), submission (587, 465), LMTP."""
