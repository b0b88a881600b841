"""The parties' way through a job: the link between them, the stages, and Flower underneath."""
