"""The commands of `profile-service`, a module each, with what they share:

options.py       flags that several commands have, and their names in the environment
terminal.py      where output goes, and how an error is said: one line, never a traceback
connection.py    calls to a running service
render.py        a profile as tables
"""
