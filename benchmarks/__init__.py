"""What the agent achieves, measured beside a bare loop and beside what users would pick instead."""
