"""The registrar: speaks with the ControlPlane for the whole server, and carries out its commands."""
