"""Tells the ControlPlane of session starts and completes, in order per session."""
