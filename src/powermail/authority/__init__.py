"""Owns a cluster's certificates at work: who gives them (registrar, service), who asks for them (asking, renewing)."""
