"""What people look at: the paper's tables and figures from runs, and the page about them."""
