"""Carries usage records to the ControlPlane: validated, enriched, delivered."""
