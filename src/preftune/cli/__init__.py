"""The command line: one short file a verb, which puts together what is below."""
