"""What a node lists: C-FIND as it is asked, rows held against what was asked for, and whether the list is whole."""
