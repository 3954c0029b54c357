"""The agent's core under a virtual clock and a seeded scheduler, against an in-process Redis and ControlPlane.

`python -m simulation --seed S` plays one seed; every seed is a life of its own, and replays to the letter.
"""
