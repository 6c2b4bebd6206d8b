"""Hostile inputs at every border: what comes back is an answer or one of our own errors, soon, and in little memory.

    python -m tests.fuzz [--minutes 10] [--harness NAME] [--plant] [--record]

An input is a JSON value that its harness makes from a number and `run` takes. Inputs run in batches in a forked child. The
child says when it begins and ends each one, so the parent knows which one ended or stopped it.
"""
