"""The page of `engines dashboard`. `state` says what it shows, `feed` keeps that up to date,
`routes` and `server` bring it to browsers, and `page/` draws it.
"""
