"""A ControlPlane and AudioAPIServers to try the agent against; what the tests and the demo talk to.

Nothing of the agent imports this package, and it judges the agent by the contract, not by the agent's code.
"""
