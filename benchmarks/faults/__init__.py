"""What goes wrong around the service, one fault a line: what clients saw, what was lost, how long until well."""
