"""Charts: one visual language, and PNGs through a browser; the only package that knows plotly and kaleido."""
