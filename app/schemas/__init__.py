"""The wire types: what a request may hold and what a reply shows. They know no SQL."""
