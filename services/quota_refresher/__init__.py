"""Asks the ControlPlane for quota and writes its grant back to the AudioAPIServer."""
