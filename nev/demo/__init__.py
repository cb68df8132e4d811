"""`nev demo`: from a folder of pictures, or from nothing, to a page that searches them."""
