"""The report room runs the notebooks on other models, estimates their cost and writes the pages."""
