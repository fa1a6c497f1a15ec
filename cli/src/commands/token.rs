//! `token …`: who may call the coordinator from elsewhere.

use coordinator::api::types::{Role, TokenRequest, TokenResponse, TokenView};
use proto::Failure;

use crate::args::{NewToken, Output, TokenCommand, TokenRole};
use crate::client::Client;
use crate::exit::Exit;
use crate::output;

const DAY_MS: u64 = 86_400_000;

/// `token …`.
pub(crate) async fn run(
    client: &Client,
    command: TokenCommand,
    format: Output,
) -> Result<Exit, Failure> {
    match command {
        TokenCommand::New(args) => {
            let token: TokenResponse = client.post("/v1/tokens", &request(&args)).await?;
            output::show(format, &token, |token| token.token.clone());
            let until = output::time(token.expires_at_ms);
            output::talk(&format!(
                "This is the only time it is shown. {} is good until {until}; pgmuster token remove {} ends it before.",
                args.name, args.name
            ));
        }
        TokenCommand::List => {
            let tokens: Vec<TokenView> = client.get("/v1/tokens").await?;
            output::show(format, &tokens, |tokens| table(tokens));
        }
        TokenCommand::Remove { name } => {
            client.delete(&format!("/v1/tokens/{name}")).await?;
            output::talk(&format!("Removed the token {name}"));
        }
    }
    Ok(Exit::Ok)
}

fn request(args: &NewToken) -> TokenRequest {
    TokenRequest {
        name: args.name.clone(),
        role: match args.role {
            TokenRole::Viewer => Role::Viewer,
            TokenRole::Operator => Role::Operator,
            TokenRole::Admin => Role::Admin,
        },
        valid_ms: Some(args.days * DAY_MS),
    }
}

fn table(tokens: &[TokenView]) -> String {
    let rows = tokens.iter().map(|token| {
        let role = match token.role {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Admin => "admin",
        };
        let (made, until) = (output::time(token.created_at_ms), output::time(token.expires_at_ms));
        vec![token.name.clone(), role.to_owned(), made, until]
    });
    output::table(&["TOKEN", "ROLE", "MADE", "GOOD UNTIL"], rows.collect())
}
