//! Names and texts inside SQL. Every name that goes into a statement comes through here; values go as parameters
//! wherever the server accepts them.

/// `name` as a quoted identifier: `"odd ""name"""`. Any text PostgreSQL stores as a name is fine.
pub fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `schema.name`, both quoted.
pub fn qualified(schema: &str, name: &str) -> String {
    format!("{}.{}", identifier(schema), identifier(name))
}

/// `text` as a string constant that reads the same under every setting of `standard_conforming_strings`.
pub fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') {
        format!(" E'{}'", quoted.replace('\\', "\\\\"))
    } else {
        format!("'{quoted}'")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names_stay_one_name() {
        assert_eq!(identifier("a\"; DROP TABLE b; --"), "\"a\"\"; DROP TABLE b; --\"");
        assert_eq!(qualified("A b", "c.d"), "\"A b\".\"c.d\"");
    }

    #[test]
    fn odd_texts_stay_one_text() {
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal("\\'; x"), " E'\\\\''; x'");
    }
}
