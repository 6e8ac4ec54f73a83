"""Tables, drawings and pages, from results files alone."""
