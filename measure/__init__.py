"""After training: functions that take arrays or a model and return dicts and figures."""
