"""The outcome of a job as people read it. Start with `outcome.render`."""
