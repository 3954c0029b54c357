"""The ControlPlane's API, as the services speak it.

client      the ten calls; what an entry's call ends in is an outcome, never an exception
gate        may we send? the breaker and the holds in one answer
verdicts    answer -> outcome, the table of contract section 3
breaker     closed, open, half-open
backoff     how long to wait before trying again
transport   one request, one answer; the one file that knows the HTTP library
errors      what the registrar's calls raise
"""
