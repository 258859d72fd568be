"""Reports: what metrics files say, as JSON, Markdown, a page and charts."""
