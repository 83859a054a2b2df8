"""Reports: the paper's tables and figures from runs, and the page about them."""
