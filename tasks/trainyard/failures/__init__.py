"""Why heavy work failed and what helps: known failures as data, recognised from logs and pods.

Pure: text and objects in, a failure out. What a failure does to a task is its exit code (see
`trainyard.errors`); what the next try does differently is a `Tuning`.
"""
