//! The recovery sheet: a page to print, enough to restore without us.

use proto::RepositoryId;

/// What the sheet says about its key.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SheetKey<'a> {
    /// The content of the key file, which makes the sheet a secret.
    KeyFile(&'a str),
    /// The id of a passphrase. Itself it is not printed: it is known by heart, or kept apart.
    Passphrase(&'a str),
    /// There is none.
    Open,
}

pub(crate) fn recovery_sheet(id: RepositoryId, place: &str, key: SheetKey<'_>) -> String {
    let (about, flag) = match key {
        SheetKey::KeyFile(text) => (
            format!(
                "Its key. Save these lines as a file, say repository.key (capital letters and hyphens do not matter):\n\n\
                 {text}\n\
                 Whoever has this sheet and the repository can read every backup. Keep it where it survives the loss of\n\
                 both, and where nobody else reads it.\n"
            ),
            " --key repository.key",
        ),
        SheetKey::Passphrase(id) => (
            format!(
                "Its passphrase has the id {id} and is not printed here. Write it on this line if the sheet is\n\
                 kept as a secret, capital letters and spaces as they are:\n\n\
                 \x20   ______________________________________________________________\n\n\
                 The commands below read it from the terminal: type it, Return, Ctrl-D.\n"
            ),
            " --passphrase -",
        ),
        SheetKey::Open => {
            ("It is not encrypted: whoever can read it can read every backup.\n".to_owned(), "")
        }
    };
    let url = format!("'{}'", place.replace('\'', r"'\''"));
    format!(
        "pgmuster recovery sheet\n\
         =======================\n\n\
         Repository {id}\n\
         at         {place}\n\n\
         {about}\n\
         To restore with nothing but the pgmuster program (if the list shows several clusters, put the name of the one\n\
         you want behind `restore`):\n\n\
         \x20   pgmuster repo list {url}{flag}\n\
         \x20   pgmuster restore --repository {url}{flag} --into /empty/directory\n"
    )
}
