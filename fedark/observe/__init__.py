"""What operators see of running processes: structured logs and metrics, neither of which ever holds a secret.

- redact: what may be a secret is taken out of a line
- logs: JSON lines with job and session id
- metrics: counters and gauges in Prometheus' text format, on loopback
"""
