"""Choosing a base model: candidates judged on the customers' own task.

- compare: taste all of a job's candidates, tune the best
- choice: candidates with figures and intervals, in order, and the reason in a sentence
"""
