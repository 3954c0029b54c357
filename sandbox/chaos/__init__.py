"""Tries to break the promises of contract section 4 in every way an operator's life can, and prints a table.

    catalogue    the registry: every fault has a name, what it does, what is expected of it
    *_faults     the faults themselves, a family a file
    schedule     seed -> steps, always the same
    world        what runs: Redis, the ControlPlane, the services, the traffic
    run          step by step: strike, lift, wait until all is well again, look
    judge        three books against each other, and everything else that must hold
    report       the table

Nothing here is imported by the agent; it starts the agent's processes as a user would.
"""
