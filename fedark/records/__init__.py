"""Records: a customer's own data, one prompt and its answer each.

    reading   records from CSV and JSON Lines files, labels, and prompt templates
    splits    into a training and a test part, and into customers

Start with `reading.Record` and `reading.read_records`. A record's content never stands in an error,
a log line or a `repr`.
"""
