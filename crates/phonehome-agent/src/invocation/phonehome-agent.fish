# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_phonehome_agent_global_optspecs
    string join \n url= build= step= token= token-file= ca= pin= client-cert= client-key= tee= merge linger= start= spool-memory= spool-dir= spool-limit= overflow= offline-limit= on-offline= require-delivery log-format= log-level= trace= config= print-config h/help V/version
end

function __fish_phonehome_agent_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_phonehome_agent_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_phonehome_agent_using_subcommand
    set -l cmd (__fish_phonehome_agent_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l url -d 'Where to phone home: wss://HOST:PORT[/PREFIX], or ws:// without encryption. Without it the command runs unobserved' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l build -d 'Build this output belongs to; required with a URL' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l step -d 'Step of the build, usually one per container [default: main]' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l token -d 'Secret of this build; never shown, never passed on to the command. Prefer the variable or --token-file' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l token-file -d 'File that holds the token' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l ca -d 'PEM file of roots to trust, in place of the system\'s' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l pin -d 'Public key the server must have, sha256:HEX of its SubjectPublicKeyInfo. Needs no CA, and wins over --ca' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l client-cert -d 'PEM file of this agent\'s certificate, for mutual TLS' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l client-key -d 'PEM file of its private key' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l tee -d 'Copy the command\'s output to the agent\'s own as well, so that the node\'s log still works' -r -f -a "on\t'Do it'
off\t'Leave it'"
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l linger -d 'How long to stay after the command\'s end until the server has accepted its log' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l start -d 'Start the command now and hold its output until the server answers, or wait for the server first' -r -f -a "now\t'At once'
connected\t'When the server has welcomed this agent'"
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l spool-memory -d 'Memory for output that the server has not confirmed yet. When it is full the command waits; nothing is lost' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l spool-dir -d 'Directory for output that the server does not confirm in time, when memory is not enough and for the next agent after a restart of the container. Without it there is memory only' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l spool-limit -d 'Most bytes in that directory' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l overflow -d 'When all of that is full: block the command, so that nothing is lost, or drop the middle of the output and say how much' -r -f -a "block\t'It stays in the pipe, and the command waits'
drop\t'The middle is left out and counted; the beginning and the newest output stay'"
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l offline-limit -d 'How long the server may confirm nothing before --on-offline applies; off for no limit' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l on-offline -d 'After that: continue, no longer waiting for room, or stop the command' -r -f -a "continue\t'Let the command go on, dropping output if need be'
stop\t'End the command'"
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l log-format -d 'Form of the agent\'s own log, on standard error' -r -f -a "text\t'For people'
json\t'One JSON object per line'"
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l log-level -d 'Least severity of it' -r -f -a "error\t'The agent failed'
warn\t'A person should look'
info\t'One line for each thing that happens'
debug\t'Every decision'
trace\t'Every frame'"
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l trace -d 'What becomes of its finer lines: ring keeps the latest and shows them before an error; live, or live:MODULE,..., shows them at once; off' -r
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l config -d 'TOML file of options: each key is an option\'s long name, and command is the COMMAND' -r -F
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l merge -d 'One pipe for both streams: their exact order, but no distinction; all of it is stdout'
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l require-delivery -d 'Exit with 125 when the server has not accepted the complete log. Otherwise delivery never changes the exit code'
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -l print-config -d 'Check and print all options, where each comes from, as such a file; run nothing. Secrets are left out'
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -s V -l version -d 'Print version'
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -a "install" -d 'Copy this program to DEST, as an init container does'
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -a "completions" -d 'Print a script that completes the command line'
complete -c phonehome-agent -n "__fish_phonehome_agent_needs_command" -a "man" -d 'Print the manual page'
complete -c phonehome-agent -n "__fish_phonehome_agent_using_subcommand install" -s h -l help -d 'Print help'
complete -c phonehome-agent -n "__fish_phonehome_agent_using_subcommand completions" -s h -l help -d 'Print help'
complete -c phonehome-agent -n "__fish_phonehome_agent_using_subcommand man" -s h -l help -d 'Print help'
