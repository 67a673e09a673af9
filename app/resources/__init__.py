"""Workflows, machines, pools and webhook endpoints; for the command line: delete an organization, compare the stores."""
