"""The operator's command: `dataplane`, or `python -m dataplane_agent`."""
