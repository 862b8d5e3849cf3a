"""Decode request bodies (JSON, Arrow, tensors) into arrays, and encode responses. Independent of connections and SQL.

JSON telemetry is parsed in tiers. A tier that declines a text (returns None) leaves it to the next one:

| tier | parser | parses | declines |
| --- | --- | --- | --- |
| 1 | instances_fast | a whole `/v1/predict` body of plain instances | options, column names, null, faults |
| 2 | json_numbers.parse_joint_rows | windows of up to 128 KiB together | column names, null, faults |
| 3 | json_numbers.parse_rows, parse_columns | one window; null where it is held | faults |
| 4 | diagnose | one window, value by value | nothing: returns values or names the faults |

Tiers 1 to 3 use `number_parser`: simdjson, or msgspec and orjson where simdjson is not installed.
"""
