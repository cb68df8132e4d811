"""What people see: tables, pictures, the page."""
