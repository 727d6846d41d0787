"""The views of the page, a module each: charts (plotly), tables and the feature browser."""
