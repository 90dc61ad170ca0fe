"""The report: reads runs and their evaluations, and draws one page of them."""
