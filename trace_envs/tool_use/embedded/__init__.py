"""Generated tool-use tasks in four small worlds: files, messages, a calendar and a shop."""
